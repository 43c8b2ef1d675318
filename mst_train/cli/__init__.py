"""From a command line to a configuration, and from errors to messages and exit statuses."""
