"""Reading images, opening and mixing sources of them, and feeding batches. Knows no other room."""
