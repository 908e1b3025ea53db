"""Configuration in general: the strict schema, and YAML."""
