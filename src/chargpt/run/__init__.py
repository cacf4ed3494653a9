"""One run: the loop that computes, what it leaves in its directory, how it stops and continues."""
