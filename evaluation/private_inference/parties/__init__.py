"""The two parties: engine, session, and the channel between them."""
