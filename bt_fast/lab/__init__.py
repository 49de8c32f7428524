"""The workbench: data, models, training runs and the command line. Nothing outside this folder imports it."""
