"""`python -m checkpoints_conversion import|export|verify|inspect ..`."""

from checkpoints_conversion.commands import main

if __name__ == "__main__":
    main()
