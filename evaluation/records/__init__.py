"""Records of results: what was measured, with its conditions."""
