"""`python -m shd_diffusion`, where the script is not on the path."""

from shd_diffusion.cli import main

if __name__ == "__main__":
    main()
