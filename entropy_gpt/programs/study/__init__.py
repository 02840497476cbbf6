"""The study: many models trained alike, compared over seeds."""
