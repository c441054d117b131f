"""Other people's trainers; each module is imported by itself."""
