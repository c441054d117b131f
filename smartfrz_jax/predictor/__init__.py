"""The SmartFRZ network, and what it reads."""
