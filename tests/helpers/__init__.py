"""What tests and developers' programs share."""
