"""The subcommands of `diffusers-mcm`, one file each with a `main(argv)`."""
