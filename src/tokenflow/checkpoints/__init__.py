"""The released checkpoint layouts, and safe reading of files from elsewhere."""
