"""What private inference costs: the price model, measured tables and plots."""
