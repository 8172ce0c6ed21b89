"""One module per resource. Endpoints translate HTTP; decisions are made below them."""
