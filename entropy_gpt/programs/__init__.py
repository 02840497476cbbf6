"""Programs: strings of workflows. Only commands import them."""
