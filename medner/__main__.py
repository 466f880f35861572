"""``python -m medner``, for where the command is not on the path."""

from medner.cli import main

if __name__ == "__main__":
    main()
