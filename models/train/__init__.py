"""The whole way from npm packages to the weights of the bundled model: `python -m models.train --help`."""
