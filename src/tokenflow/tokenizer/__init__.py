"""Images to tokens and back. Imports nothing from the other rooms."""
