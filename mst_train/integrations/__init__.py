"""The method inside other frameworks' models."""
