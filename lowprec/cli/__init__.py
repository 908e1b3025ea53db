"""The `lowprec` command: `main` is its entry, `app` the table of commands, and each command is one
file."""
