"""The version of this project, for --version, args.json, checkpoints and the package's metadata."""

VERSION = "0.9.0"
TITLE = f"CIFAR all-reduce {VERSION}"  # as --version prints it
