"""What commands show in a terminal: progress, tables, plans and results."""
