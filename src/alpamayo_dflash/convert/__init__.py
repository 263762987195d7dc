"""An official checkpoint written once more with weights in another format."""
