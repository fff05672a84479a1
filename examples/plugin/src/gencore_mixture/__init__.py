"""A mixture of Bernoullis as a gencore model plugin, and rings and discs as a data set plugin."""
