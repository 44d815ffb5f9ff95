"""Networks that published systems start from, under the usual key names, without the packages that define them."""
