"""Reading raw inputs where they lie, for every job that takes them."""
