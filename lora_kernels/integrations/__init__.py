"""Everything that knows another package's classes. Each module here imports the package it is named after."""
