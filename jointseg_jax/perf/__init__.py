"""Speed: what the compiler says of a program, and what a clock says."""
