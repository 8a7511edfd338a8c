"""Features that were computed once: a folder of safetensors files, one a split and feature.

    <key>.safetensors    values, labels, and the images' names, captions and captions' ids as JSON; what they
                         are of, and a sha256 of it all, in the header
    digests/             what is known of the bytes of images, so that they need not be hashed again

The key is the sha256 of what the values depend on, so that a file of other weights, other images or another
transform is another file. `stablerep.evaluation.cache.files` reads files without torch.
"""
