"""The HTTP service: answers predictions and takes jobs, never trains, never imports torch."""
