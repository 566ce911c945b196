"""``python -m fedknow``: the command line."""

from fedknow.cli import main

if __name__ == "__main__":
    main()
