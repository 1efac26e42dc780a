"""This process among others: its share of the cores, its rank, how ranks meet."""
