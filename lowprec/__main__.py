"""`python -m lowprec` is the `lowprec` command."""

from lowprec.cli.main import main

main()
