"""`python -m regard` is `regard`."""

from .cli import main

if __name__ == "__main__":
    main()
