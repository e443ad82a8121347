"""Pure mathematics of zeroth-order training: no I/O, no device chosen."""
