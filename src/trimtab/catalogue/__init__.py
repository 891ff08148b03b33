"""What there is, said to people: tables, search, a page per method with its evidence."""
