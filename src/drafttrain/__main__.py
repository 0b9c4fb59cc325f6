"""`python -m drafttrain`: the command line, as launchers of several processes start it."""

from drafttrain.cli import main

if __name__ == "__main__":
    main()
