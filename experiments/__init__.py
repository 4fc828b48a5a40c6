"""Methods that are kept working outside of the package; `make test-all` runs their tests."""
