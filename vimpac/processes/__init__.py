"""This process among others: its share of the cores, its rank, and how ranks meet."""
