"""The `lowprec` command."""
