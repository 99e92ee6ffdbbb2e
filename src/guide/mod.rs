//! The guide: what people who use hvsock need to know beyond the README.
//!
//! Each page is a man page, too: `man hvsock-limits` is [`limits`].

/// Makes a module of each page, which shows it as documentation, and a list of them all.
macro_rules! pages {
    ($($name:ident)*) => {
        $(
            #[doc = include_str!(concat!(stringify!($name), ".md"))]
            pub mod $name {}
        )*

        /// The pages: their names and texts, in Markdown.
        #[cfg(feature = "cli")]
        pub(crate) const PAGES: &[(&str, &str)] = &[
            $((stringify!($name), include_str!(concat!(stringify!($name), ".md")))),*
        ];
    };
}

pages! {
    commands replacing addresses configuration control services promises hyperkit limits library speed tested
}
