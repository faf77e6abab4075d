"""Programs compiled for TPUs that are not there, and what the compiler says of them."""
