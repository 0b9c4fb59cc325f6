"""The recorder in front of a server, and the reader of the growing logs that it writes."""
