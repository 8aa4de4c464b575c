"""What networks are: one table a family, found by `lookup.describe`; and what cut attention becomes."""
