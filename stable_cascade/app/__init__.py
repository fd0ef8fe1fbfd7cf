"""The page: every task of the cascade in a browser, on this machine and without a network (`stable-cascade app`)."""
