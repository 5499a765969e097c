"""Other people's tools on a bounded cache; each module imports its tool, nothing imports these."""
