"""`python -m billhook` is the command line."""

from billhook.cli.main import main

main()
