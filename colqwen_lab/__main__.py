"""`python -m colqwen_lab`: the command line, where its script is not installed."""

from colqwen_lab.cli import main

if __name__ == "__main__":
    main()
