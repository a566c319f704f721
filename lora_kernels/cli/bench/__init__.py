"""The bench command: layers and whole models against the frozen ones, every answer checked before its time."""
