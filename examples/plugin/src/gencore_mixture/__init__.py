"""Examples of gencore plugins: two mixtures, a translation of paired images, and data sets without files."""
