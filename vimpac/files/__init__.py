"""Writing files completely or not at all, and reading them without trusting them."""
