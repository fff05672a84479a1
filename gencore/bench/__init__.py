"""What is measured and tested: one table of cases for the tests, the benchmarks and the command line."""
